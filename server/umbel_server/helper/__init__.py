"""The helper: the second aggregator, a program of its own that another party runs.

    records.py   what it keeps, in one SQLite file     core.py      its decisions: offer, countersign, prepare, commit
    people.py    the devices that it vouches for       port.py      what a leader may ask, whatever lies in between
    service.py   gRPC <-> core                         folder.py    its keys and its config file
    remote.py    the leader's way to it over gRPC      program.py   settings -> running helper; health

It shares nothing with the coordinator but the messages: no keys, no store, no authority.
"""
