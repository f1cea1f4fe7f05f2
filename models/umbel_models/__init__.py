"""From a torch module to a bundle that devices run and train without torch.

`umbel_models.zoo` finds the bundles that come with the package and needs no torch; `umbel_models.compile` and what
it uses do.
"""
