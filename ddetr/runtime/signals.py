"""The signals that ask a run to stop."""

import signal

# Ctrl+C, a scheduler's, Slurm's warning, a closed terminal's. Windows has the first two.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
