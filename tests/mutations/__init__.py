"""Mutation checks: known one-line bugs, and whether the tests catch them."""
