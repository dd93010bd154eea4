from qlora_service.cli import main

main()
