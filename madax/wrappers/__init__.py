"""Any optimizer of optax, on codes and with its state in codes."""
