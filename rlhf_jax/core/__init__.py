"""Floor 0: types, masks, trees and errors. Imports nothing else of ours."""
