from layerloop.components.research.pretraining.stages import main

main()
