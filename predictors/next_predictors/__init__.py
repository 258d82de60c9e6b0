"""The built-in predictors, registered through the same hook as third-party ones."""

from next_core.hookspecs import Register, hookimpl


@hookimpl
def register_predictors(register: Register) -> None:
    register("next_predictors.step_scale:StepScalePredictor", name="step-scale")
    register("next_predictors.adaptive_secant:AdaptiveSecant", name="adaptive-secant")
    # Where a trainer's optimizer can be reached, a config's ``auto`` becomes step-scale instead.
    register("next_predictors.adaptive_secant:AdaptiveSecant", name="auto")
    register("next_predictors.stay:Stay", name="stay")
    register("next_predictors.random_direction:RandomDirection", name="random")
    register("next_predictors.secant:Secant", name="secant")
    register("next_predictors.rl_extra:RLExtra", name="rl-extra")
    register("next_predictors.re_grounding:ReGrounding", name="re-grounding")
    register("next_predictors.expo:Expo", name="expo")
    register("next_predictors.effopd:EffOPD", name="effopd")
    register("next_predictors.snoo:Snoo", name="snoo")
    register("next_predictors.ema_pull:EmaPull", name="ema-pull")
    register("next_predictors.alpharl:AlphaRL", name="alpharl")
    register("next_predictors.relex:Relex", name="relex")
    register("next_predictors.ridge:Ridge", name="ridge")
    register("next_predictors.next_mlp:NextMLP", name="next-mlp")
    register("next_predictors.next_mlp_reduced:NextMLPReduced", name="next-mlp-reduced")
