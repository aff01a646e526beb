"""Timings beside other people's models, on one machine in one run: ratios, and how much of the machine is used."""
