"""Vision and audio encoders shared by the families."""
