"""The boundary between the HTTP process and the engine process: messages over a socket pair."""
