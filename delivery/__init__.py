"""The delivery engine: claims deliveries, signs and sends them, and records what came of it."""
