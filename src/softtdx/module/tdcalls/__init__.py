"""Guest-side leaf functions, TDG.*: importing this package registers them all."""
