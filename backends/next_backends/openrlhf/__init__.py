"""OpenRLHF in an environment of its own, driven from outside."""
