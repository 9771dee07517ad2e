"""Model definitions in torch: one file per family, joined from shared layers and towers. `registry` is torch-free."""
