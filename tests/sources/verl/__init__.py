"""Tests that read and write what the real verl saves: ``make test-verl``."""
