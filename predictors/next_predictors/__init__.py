"""The predictors that come with next-core, registered exactly as a stranger's are."""

from __future__ import annotations

from next_core.hookspecs import Register, hookimpl


@hookimpl
def register_predictors(register: Register) -> None:
    register("next_predictors.auto:AutoPredictor", name="auto")
    register("next_predictors.stay:StayPredictor", name="stay")
    register("next_predictors.random_direction:RandomPredictor", name="random")
    register("next_predictors.secant:SecantPredictor", name="secant")
    register("next_predictors.rl_extra:RlExtraPredictor", name="rl-extra")
    register("next_predictors.alpharl:AlphaRlPredictor", name="alpharl")
    register("next_predictors.relex:RelexPredictor", name="relex")
    register("next_predictors.ridge:RidgePredictor", name="ridge")
    register("next_predictors.next_mlp:NextMlpPredictor", name="next-mlp")
    register("next_predictors.next_mlp_reduced:NextMlpReducedPredictor", name="next-mlp-reduced")
