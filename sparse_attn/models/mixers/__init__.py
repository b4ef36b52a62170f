"""Attention that brings a layer of its own, one file each; found by its module path, as patterns.

A mixer is a `Selector` with `layer(...)`, which gives the Linen module that a block of a model
uses in place of `SelfAttention`. Its parameters include those of `SelfAttention` under the same
names, so that layers with patterns and layers with mixers can alternate.
"""
