"""Metrics for Prometheus, of one coordinator or one helper: each in a registry of its own, at `/metrics`.

    families    how a metric is written
    calls       what only gRPC calls know
    others      how helper and database do
    rounds      tasks, rounds and sessions, as the store has them
    fleet       devices, and what they tell of their sessions
    releases    rollouts, holds, listings that wait or end
    books       audit, privacy, certificates, the disk
    page        what a scrape gets
    monitor     puts a coordinator's together
    helper      the same for a helper

What the store knows is read from it at each scrape, on a thread, and counts on where it was after a restart; what only
calls know begins at 0 with the process. Labels are names that operators gave, and words of a fixed list: never devices,
never what a caller wrote. Nothing here is imported unless somebody asked for the port.

What serves inference gets a module of its own beside `calls`, in the same registry (`Monitor.registry`).
"""
