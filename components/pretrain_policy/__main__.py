from layerloop.components.pretrain_policy.step import main

main()
