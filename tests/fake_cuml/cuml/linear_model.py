import sklearn.linear_model

from cuml.internals import wrapped

__all__ = ["LogisticRegression", "Ridge", "SGDClassifier"]

LogisticRegression = wrapped(sklearn.linear_model.LogisticRegression, __name__)
Ridge = wrapped(sklearn.linear_model.Ridge, __name__)
SGDClassifier = wrapped(sklearn.linear_model.SGDClassifier, __name__)
