"""Analysis of a trained mixture: arrays in, tables and figures (`plots`) out.

`routing`: loads and specialisation; `gate`: its certainty; `experts`: what each one does and is worth; `answers`:
confusions and calibration.
"""
