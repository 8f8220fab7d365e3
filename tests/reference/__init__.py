"""NumPy reference of the MoE layer, independent of ktk.

Nothing in here imports ktk or torch. It models every rounding that `docs/numerics.md` promises, so that a
test can ask for what is left over and nothing more:

`rounding`  round-to-nearest-even to fp32, bf16 and f16, and a correctly rounded fp32 fused multiply-add.
`quantise`  the scale rules of the formats.
`packing`   the packed parts, byte for byte.
`moe`       the layer: in float64 with an error bound for every output, and, for the integer formats, as the
            exact sequence of fp32 operations.
"""
