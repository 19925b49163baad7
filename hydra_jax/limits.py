"""The most that numbers among settings may be; of commands' flags as well, whose --help does not wait for JAX."""

MOST = 2**31 - 1
MOST_REPLACEMENTS = 10_000
MOST_CUTS = 1000
MOST_BOOTSTRAP = 100_000
"""More resamples would take memory and change nothing."""
MOST_SEED = 2**32 - 1
"""JAX takes 32 bits of a seed: a longer one would draw what another draws."""
