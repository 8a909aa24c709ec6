"""How a trained mixture is understood: arrays in, tables and figures (`plots`) out.

`routing` says who is sent where, `gate` how surely, `experts` what each one does and is worth, `answers` which
classes are confused and how far a confidence can be trusted.
"""
