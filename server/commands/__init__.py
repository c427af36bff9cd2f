"""What each command of `ram` does; `server.cli` names them and imports them only when they run."""
