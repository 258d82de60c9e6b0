"""Trainers in environments of their own, which pause and take new weights: what OpenRLHF and verl have in common."""
