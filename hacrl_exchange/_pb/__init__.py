"""Generated from proto/ by scripts/gen_protos.py. Do not edit; only the codec should import it."""
