from recon.app import main

main()
