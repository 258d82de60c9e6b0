"""OpenRLHF in an environment of its own, driven from outside."""

from next_backends.openrlhf.openrlhf_backend import OpenRlhfBackend

__all__ = ["OpenRlhfBackend"]
