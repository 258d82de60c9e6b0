"""What the site needs of its own: pages generated from the code, and formulas without a script."""
