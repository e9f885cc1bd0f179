"""Layers of a conditional normalizing flow: invertible maps of z given a context."""
