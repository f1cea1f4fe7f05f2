"""The roof: fleets on one machine, made of the same server and the same devices."""
