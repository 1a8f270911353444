"""The delivery engine: claims, signs, sends, decides and records. Start at engine."""
