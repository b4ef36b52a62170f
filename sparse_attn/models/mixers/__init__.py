"""Attention that brings a layer of its own, one file each; found by its module path, as patterns.

A mixer is a `Selector` with `layer(...)`, which gives the Linen module that a block of a model
uses in place of `SelfAttention`, and `includes(other)`: whether the parameters of a layer with
`other` are among its own, under the same names. Then layers of both kinds can alternate. Those of
`nsa` and `video_nsa` include the parameters of `SelfAttention`, those of `nsa_latent` do not.
"""
