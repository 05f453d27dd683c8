"""What is made from the tables of sizes: entry points, layouts by hardware, and the page that says what was tried."""
