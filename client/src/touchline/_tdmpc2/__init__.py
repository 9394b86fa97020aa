"""Parts of the drop-in for TD-MPC2's buffer."""
