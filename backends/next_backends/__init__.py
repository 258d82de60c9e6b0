"""First-party trainers, registered as a stranger's are; each is imported only when it is named."""

from next_core.hookspecs import Register, hookimpl


@hookimpl
def register_backends(register: Register) -> None:
    register("next_backends.openrlhf.openrlhf_backend:OpenRlhfBackend", name="openrlhf")
    register("next_backends.trl.trl_backend:TrlBackend", name="trl")
    register("next_backends.verl.verl_backend:VerlBackend", name="verl")
