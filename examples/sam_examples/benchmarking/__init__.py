"""Scripts that measure what the library costs."""
