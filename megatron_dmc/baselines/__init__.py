"""What DMC is compared with: one file per method, stated from its paper."""
