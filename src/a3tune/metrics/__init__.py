"""How good answers, reports and attention are, and how sure one can be. Knows texts and arrays, not who wrote them."""
