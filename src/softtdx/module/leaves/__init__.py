"""Host-side leaf functions, TDH.*: importing this package registers them all."""
