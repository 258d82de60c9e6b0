"""TEST-ONLY: see the package."""
