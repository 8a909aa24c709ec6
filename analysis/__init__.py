"""How a trained mixture is understood: arrays in, tables (`routing`) and figures (`plots`) out."""
