"""Likelihoods: exact ones by the probability flow, bounds, dequantization, bits per dimension."""
