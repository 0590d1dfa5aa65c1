"""The tokenizer that a mixture gets, and the proof that it cuts texts as the experts' do."""
