"""Families of shortcuts: what a word in kata.toml's `forbidden` stands for.

A dotted name is a Python function, method or class; `aten::name` is an operation, with `*` at its end a prefix.
Two kinds are needed because neither interceptor sees everything: F.rms_norm or nn.GRU decompose before they reach ATen,
and torch.ops.aten reaches an operation without any Python function.
"""

F = "torch.nn.functional."
T = "torch.Tensor."

FAMILIES: dict[str, tuple[str, ...]] = {
    "softmax": (
        "torch.softmax", T + "softmax", F + "softmax", F + "softmin", "torch.log_softmax", T + "log_softmax", F + "log_softmax",
        F + "gumbel_softmax", "torch.special.softmax", "torch.special.log_softmax", "aten::_softmax*", "aten::_log_softmax*",
        "aten::_safe_softmax",
    ),
    "logsumexp": (
        "torch.logsumexp", T + "logsumexp", "torch.special.logsumexp", "aten::logsumexp*", "torch.logaddexp", T + "logaddexp",
        "torch.logaddexp2", T + "logaddexp2", "torch.logcumsumexp", T + "logcumsumexp", "aten::logaddexp*", "aten::_logcumsumexp",
    ),
    "sdpa": (F + "scaled_dot_product_attention", "aten::_scaled_dot_product*", "aten::scaled_dot_product*", "aten::_flash_attention*"),
    "multihead": (
        "torch.nn.MultiheadAttention", F + "multi_head_attention_forward", "aten::_native_multi_head_attention",
        F + "scaled_dot_product_attention", "aten::_scaled_dot_product*", "aten::scaled_dot_product*", "aten::_flash_attention*",
    ),
    "transformer": (
        "torch.nn.Transformer", "torch.nn.TransformerEncoder", "torch.nn.TransformerDecoder", "torch.nn.TransformerEncoderLayer",
        "torch.nn.TransformerDecoderLayer", "aten::_transformer_encoder_layer_fwd",
    ),
    "linear": ("torch.nn.Linear", "torch.nn.Bilinear", F + "linear", F + "bilinear"),
    "layer_norm": ("torch.nn.LayerNorm", F + "layer_norm", "torch.layer_norm", "torch.native_layer_norm", "aten::native_layer_norm*",
                   F + "group_norm", "torch.native_group_norm", "aten::native_group_norm*"),
    "rms_norm": ("torch.nn.RMSNorm", F + "rms_norm", "torch.rms_norm", "aten::_fused_rms_norm*"),
    "batch_norm": (
        "torch.nn.BatchNorm1d", "torch.nn.BatchNorm2d", F + "batch_norm", "torch.batch_norm", "torch.native_batch_norm",
        F + "instance_norm", "aten::native_batch_norm*", "aten::_native_batch_norm*", "aten::cudnn_batch_norm*",
    ),
    "embedding": ("torch.nn.Embedding", "torch.nn.EmbeddingBag", F + "embedding", F + "embedding_bag", "torch.embedding", "aten::embedding",
                  "aten::_embedding_bag*"),
    "dropout": ("torch.nn.Dropout", F + "dropout", "torch.dropout", T + "dropout", "torch.native_dropout", "aten::native_dropout",
                F + "alpha_dropout", F + "feature_alpha_dropout"),
    "convolution": (
        "torch.nn.Conv1d", "torch.nn.Conv2d", "torch.nn.Conv3d", F + "conv1d", F + "conv2d", F + "conv3d", F + "conv_transpose2d",
        "torch.conv1d", "torch.conv2d", "torch.conv3d", "torch.convolution", "aten::convolution*", "aten::mkldnn_convolution*",
        "aten::_convolution*", "aten::cudnn_convolution*",
    ),
    "unfold": (F + "unfold", "torch.nn.Unfold", T + "unfold", "aten::im2col*", "aten::unfold", F + "fold", "aten::col2im*"),
    "pooling": (
        F + "max_pool2d", F + "avg_pool2d", F + "adaptive_max_pool2d", F + "adaptive_avg_pool2d", "torch.max_pool2d", "torch.nn.MaxPool2d",
        "torch.nn.AvgPool2d", "torch.nn.AdaptiveMaxPool2d", "torch.nn.AdaptiveAvgPool2d", F + "max_pool2d_with_indices", F + "lp_pool2d",
        "aten::max_pool2d*", "aten::avg_pool2d*", "aten::adaptive_*pool2d*", "aten::mkldnn_max_pool2d*",
    ),
    "pad": (F + "pad", "torch.constant_pad_nd", "aten::constant_pad_nd", "aten::pad", "aten::reflection_pad*", "aten::replication_pad*",
            "torch.nn.ZeroPad2d", "torch.nn.ConstantPad2d"),
    "recurrent": (
        "torch.nn.RNN", "torch.nn.LSTM", "torch.nn.GRU", "torch.nn.RNNCell", "torch.nn.LSTMCell", "torch.nn.GRUCell", "torch.lstm", "torch.gru",
        "torch.rnn_tanh", "torch.rnn_relu", "torch.lstm_cell", "torch.gru_cell", "torch.rnn_tanh_cell", "torch.rnn_relu_cell",
        "aten::lstm*", "aten::gru*", "aten::rnn_*", "aten::mkldnn_rnn_layer*", "aten::_thnn_fused_*", "aten::_cudnn_rnn*",
    ),
    "relu": ("torch.relu", T + "relu", F + "relu", F + "leaky_relu", F + "relu6", F + "threshold", F + "rrelu", F + "prelu", "torch.relu_",
             T + "relu_", "torch.nn.ReLU", "torch.nn.LeakyReLU", "torch.threshold", "aten::relu*", "aten::leaky_relu*", "aten::threshold*"),
    "sigmoid": ("torch.sigmoid", T + "sigmoid", F + "sigmoid", "torch.special.expit", "torch.nn.Sigmoid", "torch.sigmoid_", T + "sigmoid_",
                F + "logsigmoid", "torch.nn.LogSigmoid", "aten::sigmoid*", "aten::log_sigmoid*"),
    "tanh": ("torch.tanh", T + "tanh", F + "tanh", "torch.nn.Tanh", "torch.tanh_", T + "tanh_", "aten::tanh*"),
    "gelu": (F + "gelu", "torch.nn.GELU", "aten::gelu*"),
    "silu": (F + "silu", "torch.nn.SiLU", "aten::silu*"),
    "softplus": (F + "softplus", "torch.nn.Softplus", "aten::softplus*", "torch.log1p_exp"),
    "cross_entropy": (F + "cross_entropy", F + "nll_loss", "torch.nn.CrossEntropyLoss", "torch.nn.NLLLoss", "torch.nll_loss",
                      "aten::nll_loss*", "aten::cross_entropy_loss*"),
    "mse_loss": (F + "mse_loss", "torch.nn.MSELoss", "aten::mse_loss*"),
    "bce": (F + "binary_cross_entropy", F + "binary_cross_entropy_with_logits", "torch.nn.BCELoss", "torch.nn.BCEWithLogitsLoss",
            "torch.binary_cross_entropy_with_logits", F + "soft_margin_loss", F + "logsigmoid", "aten::binary_cross_entropy*"),
    "kl_div": (F + "kl_div", "torch.nn.KLDivLoss", "torch.kl_div", "torch.distributions.kl_divergence", "torch.distributions.kl.kl_divergence"),
    "autograd": (
        "torch.autograd.grad", "torch.autograd.backward", T + "backward", "torch.autograd.functional.jacobian",
        "torch.autograd.functional.hessian", "torch.autograd.functional.vjp", "torch.autograd.functional.jvp", "torch.func.grad",
        "torch.func.vjp", "torch.func.jvp", "torch.func.jacrev", "torch.func.jacfwd", "torch.func.grad_and_value", "torch.func.hessian",
        "torch.func.linearize",
    ),
    "func": (
        "torch.func.grad", "torch.func.grad_and_value", "torch.func.vjp", "torch.func.jvp", "torch.func.jacrev", "torch.func.jacfwd",
        "torch.func.hessian", "torch.func.vmap", "torch.func.functional_call", "torch.func.linearize", "torch.vmap",
        "torch.autograd.functional.jacobian", "torch.autograd.functional.hessian", "torch.autograd.functional.hvp",
        "torch.autograd.functional.vhp", "torch.autograd.functional.vjp", "torch.autograd.functional.jvp",
    ),
    "optim": (
        "torch.optim.SGD", "torch.optim.Adam", "torch.optim.AdamW", "torch.optim.Adamax", "torch.optim.NAdam", "torch.optim.RAdam",
        "torch.optim.RMSprop", "torch.optim.Adagrad", "torch.optim.Adadelta", "torch.optim.ASGD", "torch.optim.LBFGS", "torch.optim.Adafactor",
        "torch.optim.Muon", "torch.optim.sgd.sgd", "torch.optim.adam.adam", "torch.optim.adamw.adamw", "aten::_fused_adam*", "aten::_fused_sgd*",
    ),
    "meshgrid": ("torch.meshgrid", "torch.cartesian_prod", "torch.combinations", "torch.tril_indices", "torch.triu_indices", "torch.block_diag"),
    "cat": ("torch.cat", "torch.concat", "torch.concatenate", "torch.stack", "torch.hstack", "torch.vstack", "torch.dstack", "torch.column_stack",
            "torch.row_stack", "aten::cat*", "aten::stack*"),
    "repeat": ("torch.repeat_interleave", T + "repeat_interleave", T + "repeat", "torch.tile", T + "tile", "aten::repeat*"),
    "cdist": ("torch.cdist", "torch.pdist", F + "pdist", F + "pairwise_distance", "torch.nn.PairwiseDistance", "aten::_cdist_forward",
              "aten::_euclidean_dist", "aten::_pdist_forward"),
    "clip_grad": ("torch.nn.utils.clip_grad_norm_", "torch.nn.utils.clip_grad_norm", "torch.nn.utils.clip_grad.clip_grad_norm_",
                  "torch.nn.utils.get_total_norm", "torch.nn.utils.clip_grads_with_norm_"),
    "pad_sequence": ("torch.nn.utils.rnn.pad_sequence", "torch.nn.utils.rnn.pack_sequence", "torch.nn.utils.rnn.pack_padded_sequence",
                     "torch.nn.utils.rnn.pad_packed_sequence", "aten::pad_sequence", "torch.nested.nested_tensor", "torch.nested.to_padded_tensor"),
    "data_loader": ("torch.utils.data.DataLoader",),
}  # fmt: skip
