"""The paper's experiment in miniature, on two CPU cores: `make reproduce`; what came out is in docs/results.md.

`arms` says what is trained and how arms differ, `reproduce` runs it, `findings` computes what may be claimed of it,
`page` writes it down.
"""
