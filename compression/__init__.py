"""Make a trained mixture smaller: remove, merge, distil or quantise its experts."""
