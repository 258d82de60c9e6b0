"""Extensions of the documentation site: pages generated from the code, and formulas without a script."""
