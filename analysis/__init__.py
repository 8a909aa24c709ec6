"""Analysis of a trained mixture: functions from arrays to tables and figures (`plots`).

`routing`: loads and specialisation; `gate`: its certainty; `experts`: the results and the contribution of each expert;
`answers`: confusions and calibration.
"""
