"""The ops: for each stem the public function, its reference twin and its autograd."""
