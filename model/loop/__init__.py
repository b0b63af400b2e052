"""The decode loop, led by the host or resident on the device."""
