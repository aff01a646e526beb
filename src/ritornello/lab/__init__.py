"""The reasoning lab: synthetic tasks whose difficulty is counted in hops, and what loops are worth on them."""
