"""ktk inside other libraries. Each module is imported on demand, never by `ktk` itself."""
